"""Find the modules that a plan names, also where this transformers version names them otherwise."""

import difflib


class ModuleNotFound(LookupError):
    """A module that the plan names is not in the model."""


def find_modules(model, paths, planned_parameters):
    """Return the module of every path.

    A path that the model does not have is matched by structure: the modules whose parameters have
    the same names below them and the same shapes, in the order of the model, one to one.

    Args:
        model: The model.
        paths: Dotted paths of the plan, in its order.
        planned_parameters: ``shape dtype`` text by parameter name of the planned model, such as
            ``384x384 float32``.

    Returns:
        The module by path.

    Raises:
        ModuleNotFound: No module, or not as many as the plan names, have that structure.
    """
    here = dict(model.named_modules())
    found = {path: here[path] for path in paths if path in here}
    missing = [path for path in paths if path not in here]
    groups = {}
    for path in missing:
        groups.setdefault(_planned_structure(path, planned_parameters), []).append(path)
    taken = {id(module) for module in found.values()}
    for structure, members in groups.items():
        candidates = [
            module
            for module in here.values()
            if id(module) not in taken and structure and _structure(module) == structure
        ]
        if len(candidates) != len(members):
            raise ModuleNotFound(_message(members, candidates, here))
        found.update(zip(members, candidates))
    return found


def _planned_structure(path, planned_parameters):
    below = {
        name[len(path) + 1 :]: text.split(" ")[0]
        for name, text in planned_parameters.items()
        if name.startswith(path + ".")
    }
    return tuple(sorted(below.items()))


def _structure(module):
    shapes = {
        name: "x".join(str(size) for size in parameter.shape) or "scalar"
        for name, parameter in module.named_parameters()
    }
    return tuple(sorted(shapes.items()))


def _message(members, candidates, here):
    close = difflib.get_close_matches(members[0], list(here), n=3)
    hint = "; close names: " + ", ".join(close) if close else ""
    return (
        "the model has no module {!r} and {} modules of its structure for {} that the plan names{}; "
        "use the transformers version the plan was made with, or correct the paths"
    ).format(members[0], len(candidates), len(members), hint)
