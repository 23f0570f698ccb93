"""Every setting of a run: declared once, read from TOML, checked, and written back.

schema          the settings themselves, as frozen structs with their bounds and help
fields          the settings as data, for forms, ``--set`` and the reference page
toml            a file or text to a layer (a partial recipe), a layer to a recipe, a recipe to TOML
validation      every error in a layer, with the closest valid name
errors          one issue of a recipe, and the exception that carries all issues
aliases         other spellings of settings: version 0.1's, other trainers'
suggestions     likely intended settings: misspelled keys, keys in the wrong section
toml_lines      the line number of each key in a TOML text
layering        defaults < preset < the user's file < ``--set``
conflicts       settings that are valid alone and invalid together
presets         named layers: bundled ones, and the user's to save, delete and restore
diff            the settings in which two recipes differ, formatted
targets         which modules LoRA adapts: patterns parsed and written
absolute_paths  paths in a recipe, made absolute

A *layer* is parsed TOML: nested dicts that hold some of the settings.
"""
