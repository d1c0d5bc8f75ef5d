// Regions: a sheet to paint on, one layer per expert. Texts come from files: they are put in as text, never as HTML.
// The value is a list of {name, mask}: a PNG as base64, white where the expert counts. It is whole after every stroke.
const SIDE = 512;
const MOST_UNDONE = 30;
const sheet = element.querySelector('canvas');
const tools = element.querySelector('.painter-tools');
const size = element.querySelector('input[type=range]');
const undo = element.querySelector('.painter-undo');
const layers = new Map();
const before = [];
// Whose paint is on the brush; null takes paint away.
let hand, last = null, ground = null, loading = 0, known = '[]';

function blank() {
  const made = document.createElement('canvas');
  made.width = made.height = SIDE;
  return made;
}

function brush(canvas) {
  return canvas.getContext('2d', { willReadFrequently: true });
}

function colours() {
  return new Map((props.experts || []).map((expert) => [expert.name, expert.colour]));
}

function tint(canvas, colour) {
  const pen = brush(canvas);
  pen.globalCompositeOperation = 'source-in';
  pen.fillStyle = colour;
  pen.fillRect(0, 0, SIDE, SIDE);
}

function show() {
  const pen = sheet.getContext('2d');
  pen.globalAlpha = 1;
  pen.clearRect(0, 0, SIDE, SIDE);
  if (ground) pen.drawImage(ground, 0, 0, SIDE, SIDE);
  pen.globalAlpha = ground ? 0.6 : 0.85;
  for (const name of colours().keys()) if (layers.has(name)) pen.drawImage(layers.get(name), 0, 0);
}

let asked = false;
function soon() {
  if (asked) return;
  asked = true;
  requestAnimationFrame(() => { asked = false; show(); });
}

// What stands in a mask, as base64; null where nothing was painted.
function masked(layer) {
  const pixels = brush(layer).getImageData(0, 0, SIDE, SIDE);
  let any = 0;
  for (let i = 0; i < pixels.data.length; i += 4) {
    const seen = pixels.data[i + 3] > 127 ? 255 : 0;
    any |= seen;
    pixels.data[i] = pixels.data[i + 1] = pixels.data[i + 2] = seen;
    pixels.data[i + 3] = 255;
  }
  if (!any) return null;
  const made = blank();
  brush(made).putImageData(pixels, 0, 0);
  return made.toDataURL('image/png').split(',')[1];
}

async function unmasked(mask) {
  const image = new Image();
  image.src = `data:image/png;base64,${mask}`;
  await image.decode();
  const made = blank(), pen = brush(made);
  pen.drawImage(image, 0, 0, SIDE, SIDE);
  const pixels = pen.getImageData(0, 0, SIDE, SIDE);
  for (let i = 0; i < pixels.data.length; i += 4) pixels.data[i + 3] = pixels.data[i] > 127 ? 255 : 0;
  pen.putImageData(pixels, 0, 0);
  return made;
}

function remember(text) {
  before.push(known);
  before.splice(0, before.length - MOST_UNDONE);
  undo.disabled = false;
  known = text;
}

// After a stroke: the value, and word to whoever keeps it.
function keep() {
  const painted = [...layers].map(([name, layer]) => ({ name, mask: masked(layer) })).filter((entry) => entry.mask);
  const text = JSON.stringify(painted);
  if (text === known) return;
  remember(text);
  props.value = painted;
  trigger('input');
}

// A value from elsewhere (the server, or an undone stroke) onto the layers.
async function load() {
  const turn = ++loading, found = new Map();
  for (const { name, mask } of JSON.parse(known)) {
    const layer = await unmasked(mask).catch(() => null);
    if (turn !== loading) return;
    if (layer) found.set(name, layer);
  }
  layers.clear();
  for (const [name, layer] of found) layers.set(name, layer);
  retint();
}

function retint() {
  for (const [name, colour] of colours()) if (layers.has(name)) tint(layers.get(name), colour);
  show();
}

function line(from, to) {
  if (hand === undefined) return;
  const colour = colours().get(hand);
  if (colour && !layers.has(hand)) layers.set(hand, blank());
  // A place is one expert's: painting for one takes it from the others.
  for (const [name, layer] of layers) {
    const pen = brush(layer);
    pen.globalCompositeOperation = name === hand ? 'source-over' : 'destination-out';
    pen.strokeStyle = colour || '#000';
    pen.lineWidth = Number(size.value);
    pen.lineCap = pen.lineJoin = 'round';
    pen.beginPath();
    pen.moveTo(...from);
    pen.lineTo(...to);
    pen.stroke();
  }
  soon();
}

function place(event) {
  const box = sheet.getBoundingClientRect();
  return [((event.clientX - box.left) / box.width) * SIDE, ((event.clientY - box.top) / box.height) * SIDE];
}

sheet.addEventListener('pointerdown', (event) => {
  if (event.button !== 0) return;
  sheet.setPointerCapture(event.pointerId);
  loading++; // what is still being read would take the stroke away
  last = place(event);
  line(last, last);
});
sheet.addEventListener('pointermove', (event) => {
  if (!last) return;
  const moves = event.getCoalescedEvents ? event.getCoalescedEvents() : [];
  for (const move of moves.length ? moves : [event]) {
    const now = place(move);
    line(last, now);
    last = now;
  }
});
for (const kind of ['pointerup', 'pointercancel']) {
  sheet.addEventListener(kind, () => {
    if (!last) return;
    last = null;
    keep();
  });
}

undo.addEventListener('click', () => {
  if (!before.length) return;
  known = before.pop();
  undo.disabled = !before.length;
  props.value = JSON.parse(known);
  load();
  trigger('input');
});

function chip(name, label, colour) {
  const box = document.createElement('input'), made = document.createElement('label'), words = document.createElement('span');
  Object.assign(box, { type: 'radio', name: 'painter-hand', value: name ?? '', checked: name === hand });
  box.addEventListener('change', () => { hand = name; });
  words.textContent = label;
  made.className = 'painter-chip';
  made.style.setProperty('--dot', colour);
  made.append(box, words);
  return made;
}

function choices() {
  const names = [...colours()];
  if (hand !== null && !colours().has(hand)) hand = names.length ? names[0][0] : undefined;
  tools.replaceChildren(...names.map(([name, colour]) => chip(name, name, colour)), chip(null, 'Erase', 'transparent'));
  retint();
}

async function underlay() {
  const source = props.ground;
  const image = source ? Object.assign(new Image(), { src: source }) : null;
  if (image) await image.decode().catch(() => {});
  if (source !== props.ground) return;
  ground = image && image.naturalWidth ? image : null;
  sheet.style.aspectRatio = props.aspect || 1;
  show();
}

function given() {
  return JSON.stringify((props.value || []).map(({ name, mask }) => ({ name, mask })));
}

function arrived() {
  const text = given();
  if (text === known) return;
  if (known === '[]') known = text;
  else remember(text);
  load();
}

watch('value', arrived);
watch('experts', choices);
watch('ground', underlay);
known = given();
choices();
load();
underlay();
