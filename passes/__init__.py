"""Graph passes: one recogniser of BlockFFN layers, and one thin adapter per graph language."""
