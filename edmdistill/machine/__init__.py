"""What a run stands on: devices, processes, their launch and their health."""
