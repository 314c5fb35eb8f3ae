"""``layercomb finetune``: a configuration made of a few options, and what is told around its run.

`plan` makes the configuration, `pace` the number of steps for some minutes, `telling` what is
printed before and after.
"""
