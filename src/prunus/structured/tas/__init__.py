"""Transformable architecture search: widths and depths of a network learned by gradients."""
