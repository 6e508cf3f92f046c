"""The packages that the entry scripts use; README.md, "Reading the code", shows how they depend on each other."""
