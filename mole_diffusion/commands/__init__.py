"""The commands of the `mole` script, one file each; `mole_diffusion.cli` puts them together."""
