"""Choosing the widths and depths of networks that become really smaller."""
