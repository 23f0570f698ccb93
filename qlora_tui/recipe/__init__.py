"""Every setting of a run, declared once, read from TOML, checked, and written back.

schema          the settings, as frozen structs with their bounds and help
training_settings
                the settings of the optimization, which are part of schema
preference_methods
                the requirements of each method that learns from preferences
fields          the settings as data, for forms, ``--set``, comparisons and the reference page
toml            converts a file or text to a layer (a partial recipe), a layer to a recipe, a recipe to TOML
validation      finds every error in a layer, with its line and the closest valid name
aliases         other names of settings, for hints, and other spellings of values, which are accepted
trainers        which of our settings the keys of other trainers correspond to
imported        reads a recipe from axolotl, LLaMA-Factory, TRL, Unsloth or an adapter
exported        writes a recipe for axolotl, or a script that uses transformers, peft and trl
layering        merges defaults < preset < the user's file < ``--set``, and makes paths absolute
conflicts       settings that are valid alone and invalid together
presets         named layers: bundled ones, and the user's own, which can be saved, deleted and restored
targets         parses and writes the patterns that select the modules that LoRA adapts

A *layer* is parsed TOML: nested dicts that hold some of the settings.
"""
