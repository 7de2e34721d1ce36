"""Same-work comparisons against peers; correctness is checked before any number is printed."""
