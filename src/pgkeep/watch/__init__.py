"""Looking at the whole from outside: what is missing, what is wrong. Changes nothing."""
