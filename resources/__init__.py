"""One file per outside thing. Only `environment.py` reads environment names."""
