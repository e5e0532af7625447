"""Latents after each step, and pictures, of diffusers' pipelines on weights anyone can draw again.

  pip install torch==2.13.0 diffusers==0.42.1 transformers==5.23.0
  python tests/golden/pipelines.py            # writes tests/golden/pipelines.npz

Each case is a whole pipeline, as small as its networks can be: tokenizers (`golden/tokenizer`),
text encoders, U-Net or transformer, autoencoder, scheduler. Weights are drawn by numpy from the
name of each component and tensor; noise from its role: `start`, where sampling begins, and `draw`,
of the autoencoder's posterior, `shown`, of the upscaler's small picture. The references run in
float64; where diffusers says float32 (its tables, some of its steps, its pictures), the name is
bound to float64. The sinusoids of DiT's times are those it was trained with, as in `golden/dit.py`.

NAME_latents [steps b c h w] are those after each step, of a variance-preserving level: of Euler's
method, whose x is x0 + sigma eps, divided by sqrt(1 + sigma^2). NAME_picture [b c h w] is what is
decoded, neither cut to [-1, 1] nor moved.
"""

import importlib
import json
import pathlib
import re
import zlib

import numpy as np

HERE = pathlib.Path(__file__).parent
SIDES, FACTOR = (8, 12), 2  # of latents
STEPS = 5
VOCAB = len(json.loads((HERE / 'tokenizer' / 'vocab.json').read_text()))


# --- components -----------------------------------------------------------------------------------


def unet(**options):
  return dict(
    _class_name='UNet2DConditionModel', sample_size=8, in_channels=4, out_channels=4,
    block_out_channels=[16], down_block_types=['CrossAttnDownBlock2D'],
    up_block_types=['CrossAttnUpBlock2D'], layers_per_block=1,
    norm_num_groups=8, cross_attention_dim=24, attention_head_dim=4,
  ) | options


def text(**options):
  return dict(
    architectures=['CLIPTextModel'], model_type='clip_text_model', vocab_size=VOCAB,
    max_position_embeddings=77, hidden_size=24, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=2, hidden_act='quick_gelu', projection_dim=24, eos_token_id=2,
    bos_token_id=0, pad_token_id=1,
  ) | options


VAE = dict(
  _class_name='AutoencoderKL', in_channels=3, out_channels=3, latent_channels=4, sample_size=16,
  block_out_channels=[8, 16], down_block_types=['DownEncoderBlock2D'] * 2, norm_num_groups=4,
  up_block_types=['UpDecoderBlock2D'] * 2, layers_per_block=1, scaling_factor=0.18215,
)
SD = dict(unet=unet(), vae=VAE, text_encoder=text())
XL = dict(
  unet=unet(
    cross_attention_dim=40, attention_head_dim=[2], use_linear_projection=True,
    transformer_layers_per_block=[2], addition_embed_type='text_time',
    addition_time_embed_dim=256, projection_class_embeddings_input_dim=20 + 6 * 256,
  ),
  vae=VAE | dict(scaling_factor=0.13025), text_encoder=text(),
  text_encoder_2=text(
    architectures=['CLIPTextModelWithProjection'], hidden_size=16, intermediate_size=32,
    projection_dim=20, hidden_act='gelu'),
)
REFINER = dict(
  unet=XL['unet'] | dict(
    cross_attention_dim=16, projection_class_embeddings_input_dim=20 + 5 * 256),
  vae=XL['vae'] | dict(force_upcast=False), text_encoder_2=XL['text_encoder_2'],
)
UPSCALER = SD | dict(
  unet=unet(in_channels=7, num_class_embeds=1000), vae=VAE | dict(scaling_factor=0.08333))
DIT = dict(
  transformer=dict(
    _class_name='DiTTransformer2DModel', num_attention_heads=2, attention_head_dim=12,
    in_channels=4, out_channels=8, num_layers=2, sample_size=8, patch_size=2,
    num_embeds_ada_norm=1000, norm_type='ada_norm_zero', activation_fn='gelu-approximate',
    attention_bias=True, norm_elementwise_affine=False,
  ),
  vae=VAE,
)


def scheduler(name, **options):
  """As Stable Diffusion's folders have it: set_alpha_to_one=False whatever the class."""
  return dict(
    _class_name=f'{name}Scheduler', beta_schedule='scaled_linear', beta_start=0.00085,
    beta_end=0.012, num_train_timesteps=1000, steps_offset=1, set_alpha_to_one=False,
    skip_prk_steps=True, clip_sample=False, trained_betas=None,
  ) | options


DDIM, PNDM = scheduler('DDIM'), scheduler('PNDM')
LOW = scheduler('DDPM', beta_start=0.0001, beta_end=0.02)  # of the upscaler's small pictures
EULER = scheduler('EulerDiscrete', timestep_spacing='leading', use_karras_sigmas=False)


# --- cases ----------------------------------------------------------------------------------------

PROMPTS = ['a photograph of an astronaut riding a horse', 'a cat, digital painting']
NEGATIVE = 'concept art'
PICTURES = np.random.default_rng(1).integers(0, 256, (2, 16, 24, 3), np.uint8)
SMALL = PICTURES[:, ::FACTOR, ::FACTOR]
MASKS = np.zeros((2, 16, 24), np.uint8)
MASKS[0, 3:13, 5:18], MASKS[1, 0:9, 8:] = 255, 255
MASKS[0, 7, 9] = 0


def case(kind, parts, scheduler, index=(), **call):
  """index: what model_index.json says beside the parts."""
  return dict(
    kind=f'{kind}Pipeline', parts=parts, scheduler=scheduler, call=call, index=dict(index))


CASES = dict(
  ddim=case('StableDiffusion', SD, DDIM, guidance_scale=7.5, negative_prompt=NEGATIVE),
  karras=case(
    'StableDiffusion', SD, scheduler('DPMSolverMultistep', use_karras_sigmas=True),
    guidance_scale=4.0, negative_prompt=NEGATIVE),
  linspace=case(
    'StableDiffusion', SD, scheduler(
      'DPMSolverMultistep', final_sigmas_type='sigma_min', lower_order_final=False),
    guidance_scale=4.0),
  rescaled=case(
    'StableDiffusion', SD, scheduler(
      'DDIM', prediction_type='v_prediction', timestep_spacing='trailing',
      rescale_betas_zero_snr=True),
    guidance_scale=7.5, guidance_rescale=0.7),
  rescaled_eps=case('StableDiffusion', SD, EULER, guidance_scale=7.5, guidance_rescale=0.5),
  pndm=case('StableDiffusion', SD, PNDM, guidance_scale=7.5),
  image=case('StableDiffusionImg2Img', SD, DDIM, guidance_scale=7.5, strength=0.6),
  held=case('StableDiffusionInpaint', SD, EULER, guidance_scale=3.0, strength=0.8),
  inpaint=case(
    'StableDiffusionInpaint', SD | dict(unet=unet(in_channels=9)), DDIM, guidance_scale=7.5,
    strength=1.0, negative_prompt=NEGATIVE),
  instruct=case(
    'StableDiffusionInstructPix2Pix', SD | dict(unet=unet(in_channels=8)),
    scheduler('EulerDiscrete'), guidance_scale=7.5, image_guidance_scale=1.5),
  upscale=case(
    'StableDiffusionUpscale', UPSCALER, DDIM | dict(prediction_type='v_prediction'),
    guidance_scale=9.0, negative_prompt=NEGATIVE, noise_level=20),
  xl=case('StableDiffusionXL', XL, EULER, guidance_scale=5.0),
  xl_negative=case('StableDiffusionXL', XL, EULER, guidance_scale=5.0, negative_prompt=NEGATIVE),
  refine=case(
    'StableDiffusionXLImg2Img', REFINER, EULER,
    dict(requires_aesthetics_score=True, force_zeros_for_empty_prompt=False), guidance_scale=5.0,
    strength=0.6),
  dit=case(
    'DiT', DIT, scheduler(
      'DDIM', beta_schedule='linear', beta_start=1e-4, beta_end=0.02, steps_offset=0,
      set_alpha_to_one=True),
    guidance_scale=4.0, class_labels=[207, 3]),
)  # fmt: skip


def draw(component, name, shape):
  """Weights [out in ...] scaled to keep variance, norms about 1, biases of 0.1, tokens of 1/2.

  Of an encoder's name without `text_model.`, with which some versions of it begin; a DiT's
  embeddings, a copy each block, are those of the first.
  """
  name = re.sub(r'transformer_blocks\.\d+\.norm1\.emb\.', '', name.removeprefix('text_model.'))
  seed = zlib.crc32(f'{component}/{name}'.encode())
  numbers = np.random.default_rng(seed).standard_normal(shape)
  if len(shape) == 1:
    return 0.1 * numbers + ('norm' in name and name.endswith('weight'))
  if 'text' in component and 'embedding' in name:
    return numbers / 2
  return numbers * np.prod(shape[1:]) ** -0.5


def noise(role, sides=SIDES):
  """[b c h w]."""
  rng = np.random.default_rng(zlib.crc32(role.encode()))
  return rng.standard_normal((2, 3 if role == 'shown' else 4, *sides))


def sides(name):
  return (8, 8) if name == 'dit' else SIDES


def special(number):
  """{file: what it says} beside a vocabulary; the second's padding is `!`, as SDXL's."""
  pad = '!' if number else '<|endoftext|>'
  ends = dict(bos_token='<|startoftext|>', eos_token='<|endoftext|>', unk_token='<|endoftext|>')
  said = ends | dict(pad_token=pad)
  config = said | dict(model_max_length=77, tokenizer_class='CLIPTokenizer', do_lower_case=True)
  return {'tokenizer_config.json': config, 'special_tokens_map.json': said}


# --- the references -------------------------------------------------------------------------------


def main():
  import contextlib
  import tempfile
  from unittest import mock

  import diffusers
  from PIL import Image
  import torch
  import transformers

  from samplers import precision

  def tokenizer(number):
    with tempfile.TemporaryDirectory() as folder:
      for name in ('vocab.json', 'merges.txt'):
        (pathlib.Path(folder) / name).write_bytes((HERE / 'tokenizer' / name).read_bytes())
      for name, said in special(number).items():
        (pathlib.Path(folder) / name).write_text(json.dumps(said))
      return transformers.CLIPTokenizer.from_pretrained(folder)

  def network(component, config):
    if component.startswith('text'):
      made = getattr(transformers, config['architectures'][0])(
        transformers.CLIPTextConfig(**config))
    else:
      made = getattr(diffusers, config['_class_name']).from_config(config)
    made = made.double().eval()
    for name, tensor in made.named_parameters():
      tensor.data = torch.from_numpy(draw(component, name, tuple(tensor.shape)))
    return made

  def run(name, kind, parts, scheduler, call, index):
    module = importlib.import_module(getattr(diffusers, kind).__module__)
    steps = getattr(diffusers, scheduler['_class_name'])
    wide = [
      importlib.import_module(m) for m in (
        steps.__module__, 'diffusers.models.embeddings', 'diffusers.image_processor')]
    given = lambda role: lambda shape, **options: torch.from_numpy(
      noise('shown' if shape[1] == 3 else role, sides(name)))
    latents = []

    def kept(x):
      scaled = scheduler['_class_name'].startswith('Euler')
      sigma = float(made.scheduler.sigmas[made.scheduler.step_index]) if scaled else 0.0
      latents.append(x.numpy() / (1 + sigma**2) ** 0.5)

    def after(*args):
      """Of (pipeline, i, t, {'latents': x}), in older pipelines (i, t, x)."""
      kept(args[-1] if len(args) == 3 else args[-1]['latents'])
      return args[-1]

    with contextlib.ExitStack() as stack:
      stack.enter_context(precision(torch.float64, module, *wide))
      stack.enter_context(mock.patch.object(module, 'randn_tensor', given('start')))
      vae = importlib.import_module('diffusers.models.autoencoders.vae')
      stack.enter_context(mock.patch.object(vae, 'randn_tensor', given('draw')))
      stack.enter_context(torch.no_grad())
      components = {c: network(c, config) for c, config in parts.items()}
      for number in ('', '_2'):
        if f'text_encoder{number}' in parts:
          components[f'tokenizer{number}'] = tokenizer(number)
      if kind.startswith('StableDiffusion') and 'XL' not in kind:
        components |= dict(
          safety_checker=None, feature_extractor=None, requires_safety_checker=False)
      if 'Upscale' in kind:
        components['low_res_scheduler'] = diffusers.DDPMScheduler.from_config(LOW)
        del components['requires_safety_checker']
      if 'XL' in kind and 'text_encoder' not in parts:
        components |= dict(text_encoder=None, tokenizer=None)
      made = getattr(diffusers, kind)(
        scheduler=steps.from_config(scheduler), **components, **index)
      made.set_progress_bar_config(disable=True)
      for block in made.transformer.transformer_blocks if name == 'dit' else ():
        block.norm1.emb.time_proj.downscale_freq_shift = 0
      decoded = []
      decode = made.vae.decode

      def decodes(*args, **options):
        decoded.append(decode(*args, **options))
        return decoded[-1]

      stack.enter_context(mock.patch.object(made.vae, 'decode', decodes))
      if name == 'dit':
        step = made.scheduler.step

        def steps_once(*args, **options):
          out = step(*args, **options)
          kept(out.prev_sample.chunk(2)[0])
          return out

        made.scheduler.step = steps_once
      else:
        told = 'callback' if 'Upscale' in kind else 'callback_on_step_end'
        call = {'prompt': PROMPTS, told: after, **call}
        call |= {'negative_prompt': [NEGATIVE] * 2} if 'negative_prompt' in call else {}
        if 'Img2Img' in kind or 'Pix2Pix' in kind or 'Inpaint' in kind:
          call['image'] = [Image.fromarray(x) for x in PICTURES]
        if 'Inpaint' in kind:
          call['mask_image'] = [Image.fromarray(x) for x in MASKS]
        if 'Upscale' in kind:
          call['image'] = [Image.fromarray(x) for x in SMALL]
        if not any(said in kind for said in ('Img2Img', 'Pix2Pix', 'Upscale')):
          call |= dict(zip(('height', 'width'), [side * FACTOR for side in SIDES]))
      made(num_inference_steps=STEPS, output_type='pt', **call)
    picture = decoded[-1][0] if isinstance(decoded[-1], tuple) else decoded[-1].sample
    return dict(latents=np.stack(latents), picture=picture.numpy())

  outputs = {}
  for name, said in CASES.items():
    for key, value in run(name, **said).items():
      assert np.isfinite(value).all() and value.dtype == np.float64, (name, key)
      outputs[f'{name}_{key}'] = value.astype(np.float32)
    print(name, {k: (v.shape, round(float(v.std()), 3)) for k, v in outputs.items() if name in k})
  versions = (
    f'diffusers {diffusers.__version__}, transformers {transformers.__version__}, '
    f'torch {torch.__version__}, numpy {np.__version__}'
  )
  np.savez_compressed(pathlib.Path(__file__).with_suffix('.npz'), versions=versions, **outputs)
  print(versions)


if __name__ == '__main__':
  main()
