"""Training runs on real data; every entry is `python experiments/<entry>.py`."""
