"""Version of the front end that this imitates; the local part says that it is not the real one."""

__version__ = "3.4.0+standin"
