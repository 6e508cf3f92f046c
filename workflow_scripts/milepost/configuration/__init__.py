"""The typed definition of everything that a user may configure, and how the files are read into it."""
