"""Extension for AUTOMATIC1111's web UI and Forge: experts, gates and regions in txt2img and img2img.

Only `scripts/mole.py` imports the host's `modules`; everything here is given what it needs, and imports torch
and mole_diffusion only when a picture is drawn.
"""
