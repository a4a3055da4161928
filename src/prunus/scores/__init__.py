"""How much each unit matters: one small pure function per score; higher means keep."""
