"""Code that diffusers runs: each module here goes into the exported folder as one file, by `export.bundle`."""
