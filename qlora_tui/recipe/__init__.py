"""Every setting of a run, declared once, read from TOML, checked, and written back.

schema          the settings themselves, as frozen structs with their bounds and help
training_settings
                those of the optimization
preference_methods
                the requirements of each method that learns from preferences
fields          the settings as data, for forms, ``--set``, comparisons and the reference page
toml            a file or text to a layer (a partial recipe), a layer to a recipe, a recipe to TOML
validation      every error in a layer, with its line and the closest valid name
aliases         other trainers' spellings of settings; the meaning of misspelled ones
trainers        the meaning of other trainers' keys in our settings
imported        a recipe from axolotl, LLaMA-Factory, TRL, Unsloth or an adapter
exported        a recipe for axolotl, or as a script of transformers, peft and trl
layering        defaults < preset < the user's file < ``--set``; absolute paths
conflicts       settings that are valid alone and invalid together
presets         named layers: bundled ones, and the user's to save, delete and restore
targets         which modules LoRA adapts: patterns parsed and written

A *layer* is parsed TOML: nested dicts that hold some of the settings.
"""
