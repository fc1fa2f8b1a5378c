"""`python -m pacenote` is the `pacenote` command."""

from pacenote.trainer.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
