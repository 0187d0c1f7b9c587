"""YAML as people mean it."""

import re
from typing import Any

import yaml


class SettingsLoader(yaml.SafeLoader):
    """YAML with numbers as in JSON and YAML 1.2: 2e-2 is one; 1:30 and 010 are text, as are dates."""


class SettingsDumper(yaml.SafeDumper):
    """Quotes text that SettingsLoader, or another reader of YAML, would take for a number."""


NUMBER, DECIMALS = "[-+]?(?:0|[1-9][0-9_]*)", r"\.[0-9_]*"
FLOAT = rf"{NUMBER}{DECIMALS}(?:[eE][-+]?[0-9]+)?|{NUMBER}[eE][-+]?[0-9]+|[-+]?\.[0-9]+(?:[eE][-+]?[0-9]+)?"
SettingsLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in entries if tag.rpartition(":")[2] not in ("int", "float", "timestamp")]
    for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for reader in (SettingsLoader, SettingsDumper):
    for name, pattern in (("int", NUMBER), ("float", rf"{FLOAT}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")):
        reader.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(f"(?:{pattern})$"), list("-+.0123456789"))


def _represent_text(dumper: SettingsDumper, text: str) -> yaml.ScalarNode:
    """Escapes the line breaks of Unicode: within other quotes they would be read as spaces."""
    style = '"' if re.search("[\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


SettingsDumper.add_representer(str, _represent_text)


def load_yaml(text: str) -> Any:
    """What a file of settings says. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=SettingsLoader)


def dump_yaml(settings: Any) -> str:
    return yaml.dump(settings, Dumper=SettingsDumper, sort_keys=False, allow_unicode=True)
