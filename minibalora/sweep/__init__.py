"""Run a training script for every combination of its flags' values, and compare what the runs reached."""
