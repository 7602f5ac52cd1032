"""How anything is measured: processes, memory, time, data, and the exact result."""
