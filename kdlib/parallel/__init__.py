"""Processes: started, placed on cores and machines, and talking to each other; they change no number."""
