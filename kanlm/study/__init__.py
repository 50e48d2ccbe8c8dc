"""A study: many short trainings in phases, judged by paired seeds on text that no choice looks at."""
