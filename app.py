"""The app in the browser: `python app.py`, with the options of `mole app` (`python app.py --help`)."""

import sys

from mole_diffusion.cli import main

if __name__ == "__main__":
    main(["app", *sys.argv[1:]])
