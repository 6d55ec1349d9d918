"""The way back: find, rebuild and recover a backup."""
