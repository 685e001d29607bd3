"""From the plain-text source of a unit to the learner's notebook and the solved one."""
