"""State of the fake host."""

from types import SimpleNamespace


class Options:
    def __init__(self) -> None:
        self.data = {}

    def add_option(self, name, info):
        self.data.setdefault(name, info.default)

    def __getattr__(self, name):
        if name in self.__dict__.get("data", {}):
            return self.data[name]
        raise AttributeError(name)


class OptionInfo:
    def __init__(self, default=None, label="", component=None, component_args=None, section=None):
        self.default, self.label, self.component = default, label, component
        self.component_args, self.section = component_args, section


opts = Options()
cmd_opts = SimpleNamespace()
state = SimpleNamespace(interrupted=False)
sd_model = None
