"""The machine under a run: devices, processes, their launch and their health."""
