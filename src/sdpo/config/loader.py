"""Read a config file, apply overrides, and refuse unknown, renamed and malformed keys with one-line messages."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sdpo.config.field import Section, is_too_large
from sdpo.config.official import translate_official_keys
from sdpo.config.renamed import RENAMED_KEYS
from sdpo.config.root import SDPOConfig, iterate_settings
from sdpo.errors import ConfigError, SDPOError

MAX_YAML_DEPTH = 50
MAX_YAML_NODES = 100_000

_MAPPINGS = tuple(key for key, f in iterate_settings() if str(f.type).startswith("dict"))
_SECTIONS = tuple(f.name for f in dataclasses.fields(SDPOConfig) if f.default_factory is not dataclasses.MISSING)


def flatten_keys(settings: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to dotted keys; the last of equal keys wins, and an empty mapping is a value."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten_keys(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> SDPOConfig:
    """Read a config file and apply ``key=value`` overrides.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown (with the nearest known key), a value has the
            wrong type or is out of range, or a mandatory key is not set.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise ConfigError(f"{path}: no such config file; examples are in configs/")
    try:
        _check_yaml_size(path)
        loaded = OmegaConf.load(path)
    except SDPOError:
        raise
    except Exception as error:  # yaml raises various errors
        raise ConfigError(f"{path}: not a YAML file: {_one_line(error)}") from error
    if isinstance(loaded, ListConfig) or not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: must be a mapping of settings at the top level")
    for override in overrides:
        if "=" not in override or override.startswith("="):
            raise ConfigError(f"override {override!r} is not of the form key=value")
    try:
        changes = OmegaConf.from_dotlist(list(overrides))
    except Exception as error:
        raise ConfigError(f"overrides {' '.join(overrides)}: {_one_line(error)}") from error
    return _build_config([(str(path), loaded), *([("command line", changes)] if overrides else [])])


def _check_yaml_size(path: Path) -> None:
    """Refuse YAML that is too deep or too large with its aliases expanded, or endless."""
    with path.open(encoding="utf-8") as file:
        pending = [(yaml.compose(file), 1)]
    num_nodes = 0
    while pending:
        node, depth = pending.pop()
        num_nodes += 1
        if depth > MAX_YAML_DEPTH or num_nodes > MAX_YAML_NODES:
            raise ConfigError(
                f"{path}: line {node.start_mark.line + 1}: more than {MAX_YAML_DEPTH} levels or {MAX_YAML_NODES} "
                "values, aliases expanded; reduce it to sections of settings"
            )
        if isinstance(node, yaml.MappingNode):
            pending += [(child, depth + 1) for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            pending += [(child, depth + 1) for child in node.value]


def _build_config(sources: Sequence[tuple[str, DictConfig]]) -> SDPOConfig:
    merged = OmegaConf.structured(SDPOConfig)
    for node in [merged, *(merged[name] for name in _SECTIONS)]:
        OmegaConf.set_readonly(node, None)  # frozen dataclasses become read-only nodes
    for origin, source in sources:
        values: Any = OmegaConf.to_container(source, resolve=False)
        if isinstance(values.get("self_distillation"), dict):
            translate_official_keys(origin, values["self_distillation"])
            source["self_distillation"] = values["self_distillation"]
        _refuse_unknown_keys(origin, values)
        if isinstance(values.get("verl"), Mapping):
            source["verl"] = flatten_keys(values["verl"])  # nested and dotted forms of a key become equal
        try:
            for key in _MAPPINGS:
                if OmegaConf.select(source, key) == {}:  # merging an empty mapping would change nothing
                    OmegaConf.update(merged, key, {}, merge=False)
            merged = OmegaConf.merge(merged, source)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{origin}: {_explain(error)}") from error
    origin = " + ".join(name for name, _ in sources)
    try:
        for key, f in iterate_settings():
            value = OmegaConf.select(
                merged, key
            )  # unlike resolve, its error names the key with the failed interpolation
            _access_all(value)
            if str(f.type).startswith("list") and not isinstance(value, ListConfig):
                raise ConfigError(f"{key}={value}: must be a list, in brackets")
        OmegaConf.resolve(merged)
        _expand_home(merged)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(f"{missing[0]} is not set; add it to the file or as {missing[0]}=...")
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ConfigError(f"{origin}: {_explain(error)}") from error
    except SDPOError as error:
        raise ConfigError(f"{origin}: {error}") from None


def _access_all(value: Any) -> None:
    """Access all nested values, so that failed interpolations raise."""
    for inner in value.values() if isinstance(value, DictConfig) else value if isinstance(value, ListConfig) else ():
        _access_all(inner)


def _expand_home(merged: DictConfig) -> None:
    for key, f in iterate_settings():
        value = OmegaConf.select(merged, key) if f.metadata["is_path"] else None
        if isinstance(value, str):
            OmegaConf.update(merged, key, os.path.expanduser(value))
        elif value is not None:
            OmegaConf.update(merged, key, [os.path.expanduser(each) for each in value])


def save_config(config: SDPOConfig, path: str | Path) -> None:
    """Write the resolved config as YAML; ``load_config`` reads an equal config from it."""
    Path(path).write_text(to_yaml(config), encoding="utf-8")


def to_yaml(config: SDPOConfig) -> str:
    """Format the resolved config as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _refuse_unknown_keys(origin: str, values: Any, schema: Any = None, prefix: str = "") -> None:
    schema = SDPOConfig() if schema is None else schema
    known = {f.name: getattr(schema, f.name) for f in dataclasses.fields(schema)}
    if not isinstance(values, Mapping):
        raise ConfigError(f"{origin}: {prefix.rstrip('.')}={values}: must be a section of settings")
    for key, value in values.items():
        _refuse_renamed_key(origin, f"{prefix}{key}", value)
        if key not in known:
            every = [k for k, _ in iterate_settings()] + [f.name for f in dataclasses.fields(SDPOConfig)]
            near = difflib.get_close_matches(f"{prefix}{key}", every, n=1, cutoff=0.5)
            same = [k for k in every if k.split(".")[-1] == str(key)]  # in another section
            near = same if same and not prefix else near or same[:1]
            hint = f"; did you mean {' or '.join(near)}?" if near else "; docs/configuration.md lists all keys"
            raise ConfigError(f"{origin}: unknown key {prefix}{key}{hint}")
        if not isinstance(known[key], Section) and not _can_be_written(value):
            raise ConfigError(f"{origin}: {prefix}{key}={value!r}: has invalid characters; remove them")
        if is_too_large(value):  # too large even for a conversion to float
            raise ConfigError(f"{origin}: {prefix}{key}={value!s:.40}: must be an integer of 64 bits")
        if isinstance(known[key], Section):
            _refuse_unknown_keys(origin, value, known[key], f"{key}.")
        elif isinstance(known[key], list) and not isinstance(value, list) and "${" not in str(value):
            raise ConfigError(f"{origin}: {prefix}{key}={value}: must be a list, in brackets")
        elif isinstance(known[key], list) and any(isinstance(each, (list, Mapping)) for each in value):
            raise ConfigError(f"{origin}: {prefix}{key}={value}: must be a list of names")
        elif isinstance(known[key], dict) and not isinstance(value, Mapping):
            raise ConfigError(f"{origin}: {prefix}{key}={value}: must be a mapping of names to values")


def _refuse_renamed_key(origin: str, key: str, value: Any) -> None:
    if new := RENAMED_KEYS.get(key):
        raise ConfigError(f"{origin}: {key} is now {new}; rename it")
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _refuse_renamed_key(origin, f"{key}.{name}", inner)


def _can_be_written(value: Any) -> bool:
    """Whether no text in a value contains NUL or a half of a surrogate pair."""
    if isinstance(value, Mapping):
        return all(_can_be_written(each) for each in [*value, *value.values()])
    if isinstance(value, list):
        return all(map(_can_be_written, value))
    return not isinstance(value, str) or not any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value)


def _explain(error: OmegaConfBaseException) -> str:
    key = getattr(error, "full_key", None) or ""
    message = _one_line(str(error).splitlines()[0])
    return f"{key}: {message}" if key and not message.startswith(key) else message


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
