"""Tools that a policy calls while it writes: functions of the user's, or Python in a sandbox."""
