"""Report page, charts and selection card: functions of a finished run folder."""
