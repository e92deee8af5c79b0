// A click on a face tells the server which; the slider sets how strongly maps show, and keeps it.
element.addEventListener('click', (event) => {
  const face = event.target.closest('[data-face]');
  if (face) trigger('click', { face: Number(face.dataset.face) });
});
const show = (value) => element.style.setProperty('--map', value / 100);
element.addEventListener('input', (event) => {
  element.dataset.map = event.target.value;
  show(event.target.value);
});
watch('value', () => {
  const slider = element.querySelector('input[type=range]');
  if (slider && element.dataset.map) slider.value = element.dataset.map;
});
