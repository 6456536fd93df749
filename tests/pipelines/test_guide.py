"""Models that another one guides away from (autoguidance)."""

import pytest
from conditional_helpers import class_pipeline, class_unet, vector_pipeline


def test_a_guide_of_other_conditions_is_refused():
    guided = {"guidance_scale": 2.0, "num_inference_steps": 1}
    pipeline = class_pipeline(guidance_unet=class_unet(num_class_embeds=6))
    with pytest.raises(ValueError, match=r"guidance_unet must take .* \(it has .*num_class_embeds 6, not 4\)"):
        pipeline(1, **guided)
    both = vector_pipeline(num_class_embeds=4)
    both.register_modules(guidance_unet=class_unet())
    with pytest.raises(ValueError, match="guidance_unet must take .*class_embed_type None, not identity"):
        both(class_labels=1, vectors=[1.0, 2, 3], **guided)
    other = vector_pipeline()
    both.register_modules(guidance_unet=other.unet, guidance_vector_embedding=other.vector_embedding)
    with pytest.raises(ValueError, match="guidance_unet must take .*num_class_embeds None, not 4"):
        both(class_labels=1, vectors=[1.0, 2, 3], **guided)
