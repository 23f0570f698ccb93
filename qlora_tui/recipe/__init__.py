"""Every setting of a run: declared once, read from TOML, checked, and written back.

schema      the settings themselves, as frozen structs with their bounds and help
fields      the same as data, for forms, ``--set`` and the reference page
toml        a file or text to a layer (a partial recipe), a layer to a recipe, a recipe to TOML
validation  every mistake in a layer, with the near match
mistakes    one mistake, and the exception that carries them all
near        what was probably meant: other tools' names, keys in the wrong section
lines       on which line of a TOML text each key stands
overlay     defaults < preset < the user's file < ``--set``
conflicts   settings that are right alone and wrong together
presets     named layers: shipped ones, and the user's to save, delete and restore
difference  what two recipes disagree on, in words
targets     which modules LoRA touches: patterns in and out
locations   its paths, made independent of the folder it was written in

A *layer* is what TOML gives: nested dicts that hold some of the settings.
"""
