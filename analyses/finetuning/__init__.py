"""The experiment behind the study: fine-tune a pre-trained model on pairs of texts, recorded.

`pairs` and `docstrings` are the data, `models` what is started from, `task` what is learned,
`recipe` how, `training` does it once, `sweep` does it many times.
"""
