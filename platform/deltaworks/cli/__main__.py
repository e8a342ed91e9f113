"""`python -m deltaworks.cli`."""

from deltaworks.cli.commands import main

if __name__ == "__main__":
    main()
