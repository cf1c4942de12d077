"""Speed, measured: each module runs by itself and ends with one line of JSON."""
