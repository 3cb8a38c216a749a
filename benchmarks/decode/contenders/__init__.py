"""The programs that are compared, one process each. They import the engine that they run and the standard library."""
