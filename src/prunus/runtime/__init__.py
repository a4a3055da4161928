"""Really faster: the native engine, what compiles models for it, measuring and exporting."""
