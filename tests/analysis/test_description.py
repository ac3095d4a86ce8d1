"""What a model is, in words."""

import irra_core as irra


def test_the_description_counts_what_the_small_model_has():
    recipe = irra.recipe(pretrained="none", interaction_depth=3)
    said = irra.analysis.describe(irra.build_model(recipe, num_ids=7), recipe)
    assert said["image height × width (pixels)"] == "96×32"
    assert said["image encoder"] == said["text encoder"] == "3 blocks of width 128"
    assert said["interaction encoder"] == "CrossEncoder, 3 blocks"
    assert said["token selection"] == "none"
    assert (said["identities of the classifier"], said["trained on"]) == (7, "synthetic")
    assert (
        irra.analysis.describe(irra.build_model(irra.recipe(pretrained="none", losses="itc"), 7))[
            "parameters (millions)"
        ]
        < 8
    )


def test_a_models_token_selection_is_named():
    selecting = irra.recipe(pretrained="none", losses="tal+tse", token_selection="layers")
    assert irra.analysis.describe(irra.build_model(selecting, 7))["token selection"] == "layers"
