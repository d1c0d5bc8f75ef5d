// Experts as tiles. Texts come from files: they are put in as text, never as HTML.
const root = element.querySelector('.tiles');

function made(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? '' : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

function text(kind, content) {
  const node = made('span', { class: kind });
  node.textContent = content;
  return node;
}

function picture(tile) {
  if (!tile.picture) return text('tile-blank', tile.initial);
  return made('img', { src: tile.picture, alt: '', loading: 'lazy' });
}

function strength(tile) {
  const range = made('input', {
    type: 'range', min: 0, max: 2, step: 0.05, 'data-strength': tile.name, 'aria-label': `Strength of ${tile.name}`,
  });
  range.value = tile.strength;
  const shown = document.createElement('output');
  shown.textContent = Number(tile.strength).toFixed(2);
  return made('label', { class: 'tile-strength' }, text('', 'Strength'), shown, range);
}

function face(tile) {
  const box = made('input', { type: 'checkbox', 'data-tile': tile.name, 'aria-label': `Use ${tile.name}` });
  box.checked = tile.on;
  const tick = made('span', { class: 'tile-tick', 'aria-hidden': 'true' });
  const words = [text('tile-name', tile.name), text('tile-text', tile.text)];
  if (tile.note) words.push(text('tile-note', tile.note));
  return made('label', { class: 'tile-face', title: tile.text }, box, picture(tile), tick, ...words);
}

function drawn(tile) {
  const node = made('div', { class: tile.on ? 'tile tile-on' : 'tile' });
  node.style.setProperty('--tile-colour', tile.colour);
  node.append(face(tile));
  if (tile.adjustable) node.append(strength(tile));
  return node;
}

// All anew, from the value alone: what is seen and what is drawn with cannot differ.
function draw() {
  const focused = document.activeElement && root.contains(document.activeElement) ? document.activeElement.dataset : {};
  root.replaceChildren(...(props.value || []).map(drawn));
  const again = [...root.querySelectorAll('input')].find((input) =>
    (focused.tile && input.dataset.tile === focused.tile) || (focused.strength && input.dataset.strength === focused.strength));
  if (again) again.focus();
}

element.addEventListener('input', (event) => {
  const slider = event.target.closest('input[data-strength]');
  if (slider) slider.parentElement.querySelector('output').textContent = Number(slider.value).toFixed(2);
});

// On release, not while dragging: the tiles are drawn anew under the pointer.
element.addEventListener('change', (event) => {
  const { tile: name, strength: scaled } = event.target.dataset;
  if (name === undefined && scaled === undefined) return;
  props.value = props.value.map((tile) => {
    if (tile.name === name) return { ...tile, on: event.target.checked };
    if (tile.name === scaled) return { ...tile, strength: Number(event.target.value).toFixed(2) };
    return tile;
  });
  draw();
  trigger('select');
});

root.setAttribute('aria-label', props.caption);
watch('value', draw);
draw();
