"""Which axes of which tensors belong together, and how to remove them: trace, rules, groups, plans."""
