"""What no method changes. Nothing here imports a script, `common` or `eval`."""
