"""The app in the browser: `python app.py`, with the options of `mole app` (`python app.py --help`)."""

import sys

from mole_diffusion.cli import app

if __name__ == "__main__":
    app(["app", *sys.argv[1:]], prog_name="mole")
