"""The plugin's own tests need pytester; everything else lives in parity/plugin.py."""

pytest_plugins = ["pytester"]
