"""The packages behind the entry scripts beside this folder; see the README for who calls whom."""
