"""The multi-token model as plain torch modules: no engine, no data. Start in mtp.py."""
