// Plays the denoising of every .sample of the page. What stands where is a function of the step alone, so that any
// step can be shown at once, forwards and backwards.
const still = matchMedia('(prefers-reduced-motion: reduce)').matches;
const whole = document.body.hasAttribute('data-player');  // the page is a player: it has the keys, and starts by itself
const waits = still || document.body.dataset.player === 'still';  // or waits at the end, having been watched already
const speeds = [0.125, 0.25, 0.5, 1, 2, 4, 8, 16];
const percent = share => `${(100 * share).toFixed(share > 0 && share < 0.01 ? 1 : 0)} %`;
const pen = document.createElement('canvas').getContext('2d');
const tip = document.createElement('div');
tip.className = 'tip';
tip.setAttribute('role', 'status');
tip.hidden = true;
document.body.append(tip);
const players = [];
let current = null;

const player = sample => {
  const page = sample.querySelector('.page');
  const controls = sample.querySelector('.controls');
  const button = Object.fromEntries(Array.from(controls.querySelectorAll('button'), b => [b.dataset.do, b]));
  const slider = controls.querySelector('input');
  const readout = controls.querySelector('output');
  const tokens = Array.from(page.children);
  const last = Number(slider.max);
  const recent = Number(page.dataset.window);
  const numbers = text => text ? text.split(' ').map(Number) : [];
  const steps = numbers(page.dataset.steps), sure = numbers(page.dataset.confidence);

  // All tokens that ever stood at a place, in their order: from step `from` until `until`.
  const visits = tokens.map((_, i) => [{from: steps[i], until: Infinity, text: null, sure: sure[i]}]);
  for (const [i, from, until, text, p] of JSON.parse(page.dataset.past || '[]'))
    visits[i].push({from, until, text, sure: p});
  for (const here of visits) here.sort((a, b) => a.from - b.from || a.until - b.until);
  const written = new Array(last + 1).fill(0), erased = new Array(last + 1).fill(0);
  const touched = Array.from({length: last + 1}, () => []);
  visits.forEach((here, i) => here.forEach(({from, until}) => {
    written[from] += 1;
    touched[from].push(i);
    if (until <= last) { erased[until] += 1; touched[until].push(i); }
  }));
  const masks = [tokens.length - written[0]];
  for (let s = 1; s <= last; s++) masks.push(masks[s - 1] - written[s] + erased[s]);

  const fits = new Map();  // what stood there before is squeezed into the room of the final token: lines never jump
  const fit = (i, text) => {
    const key = `${i} ${text}`;
    if (!fits.has(key)) {
      const {fontWeight, fontSize, fontFamily} = getComputedStyle(page);
      pen.font = `${fontWeight} ${fontSize} ${fontFamily}`;
      const room = tokens[i].getClientRects()[0]?.width || 0, wanted = pen.measureText(text).width;
      if (!room) return 1;
      fits.set(key, wanted > room ? room / wanted : 1);
    }
    return fits.get(key);
  };
  const at = (i, step) => visits[i].find(v => v.from <= step && step < v.until);
  const draw = (i, step, mark) => {
    const token = tokens[i], now = at(i, step);
    token.classList.toggle('m', !now);
    token.classList.toggle('again', !now && visits[i][0].from <= step);
    token.classList.toggle('was', Boolean(now && now.text !== null));
    token.classList.toggle('new', Boolean(mark && now && now.from > 0 && now.from > step - recent));
    if (!now) return;
    if (now.text !== null) {
      token.dataset.was = now.text;
      token.style.setProperty('--fit', fit(i, now.text).toFixed(3));
    }
    token.style.setProperty('--a', ((now.from - 1) / Math.max(1, last - 1)).toFixed(3));
    token.style.setProperty('--c', now.sure === undefined ? 1 : now.sure);
  };

  let shown = last, marked = [], pace = speeds.indexOf(1), clock = null, reached = 0;
  const show = (step, mark = true) => {
    const stale = new Set(marked);
    for (let s = Math.min(shown, step) + 1; s <= Math.max(shown, step); s++) for (const i of touched[s]) stale.add(i);
    marked = [];
    if (mark) for (let s = Math.max(1, step - recent + 1); s <= step; s++) marked.push(...touched[s]);
    for (const i of marked) stale.add(i);
    for (const i of stale) draw(i, step, mark);
    shown = step;
    slider.value = step;
    const now = [];
    if (step && written[step]) now.push(`${written[step]} written`);
    if (step && erased[step]) now.push(`${erased[step]} taken back`);
    const left = `${masks[step]} ${masks[step] === 1 ? 'mask' : 'masks'} left`;
    readout.replaceChildren(...[`step ${step} of ${last}`, left, ...now].map(fact => {
      const part = document.createElement('span');
      part.textContent = fact;
      return part;
    }));
    slider.setAttribute('aria-valuetext', `step ${step} of ${last}, ${left}`);
    button.back.disabled = button.first.disabled = step === 0;
    button.forth.disabled = button.last.disabled = step === last;
    explain();
  };

  // Speed 1 takes 1.5 to 12 seconds, whatever the number of steps.
  const rate = () => speeds[pace] * last / Math.min(12, Math.max(1.5, 0.14 * last));
  const stop = () => {
    clock = null;
    sample.classList.remove('playing');
    button.play.setAttribute('aria-label', 'Play');
  };
  const tick = now => {
    if (clock === null) return;
    reached = Math.min(last, reached + rate() * Math.max(0, now - clock) / 1000);
    clock = now;
    if (Math.floor(reached) !== shown) show(Math.floor(reached));
    if (reached >= last) stop(); else requestAnimationFrame(tick);
  };
  const play = () => {
    if (clock !== null) return stop();
    for (const other of players) other.stop();
    reached = shown >= last ? 0 : shown;
    show(reached);
    clock = performance.now();
    sample.classList.add('playing');
    button.play.setAttribute('aria-label', 'Pause');
    requestAnimationFrame(tick);
  };
  const go = step => { stop(); show(Math.min(last, Math.max(0, step))); };
  const hurry = by => {
    pace = Math.min(speeds.length - 1, Math.max(0, pace + by));
    sample.querySelector('.pace').textContent = `${speeds[pace] < 1 ? `1/${1 / speeds[pace]}` : speeds[pace]}×`;
    button.slower.disabled = pace === 0;
    button.faster.disabled = pace === speeds.length - 1;
  };
  const tint = () => button.tint.setAttribute('aria-pressed', page.classList.toggle('tinted'));

  // What is said of the token under the pointer, or of the one that was touched.
  let asked = null;
  const told = ({from, until, sure: p}) => {
    const when = until > last ? `step ${from} of ${last}` : until > from + 1 ? `steps ${from} to ${until - 1}` : `step ${from}`;
    return p === undefined ? when : `${when} · confidence ${percent(p)}`;
  };
  const explain = () => {
    if (asked === null) return;
    const now = at(asked, shown), line = (text, kind) => {
      const part = document.createElement('p');
      part.className = kind;
      part.textContent = text;
      return part;
    };
    const name = text => `“${text.replace(/\n/g, '⏎')}”`;
    const body = visit => visit.text === null ? tokens[asked].textContent : visit.text;
    const lines = [];
    if (!now) {
      lines.push(line('masked', 'what'), line(`written at step ${visits[asked].find(v => v.from > shown).from}`, 'how'));
    } else {
      lines.push(line(name(body(now)), 'what'), line(now.from ? told(now) : 'given', 'how'));
    }
    const before = visits[asked].filter(v => v.until <= shown);
    if (before.length) lines.push(line('before that', 'then'));
    for (const v of before.reverse().slice(0, 5)) lines.push(line(`${name(body(v))} ${told(v)}`, 'how'));
    if (before.length > 5) lines.push(line(`and ${before.length - 5} more`, 'how'));
    tip.replaceChildren(...lines);
    tip.hidden = false;
    const box = tokens[asked].getClientRects()[0], wide = document.documentElement.clientWidth;
    if (!box) return;
    const {width, height} = tip.getBoundingClientRect(), above = box.top - height - 8;
    tip.style.left = `${scrollX + Math.max(8, Math.min(wide - width - 8, box.left + box.width / 2 - width / 2))}px`;
    tip.style.top = `${scrollY + (above < 4 ? box.bottom + 8 : above)}px`;
  };
  const ask = target => {
    if (asked !== null) tokens[asked].classList.remove('asked');
    const found = tokens.indexOf(target);
    asked = found < 0 ? null : found;
    tip.hidden = asked === null;
    if (asked !== null) { tokens[asked].classList.add('asked'); explain(); }
  };
  page.addEventListener('pointerover', event => { if (event.pointerType !== 'touch') ask(event.target); });
  page.addEventListener('pointerleave', event => { if (event.pointerType !== 'touch') ask(null); });
  page.addEventListener('click', event => ask(event.target));
  sample.addEventListener('pointerdown', () => { current = self; });
  slider.addEventListener('input', () => go(Number(slider.value)));
  const actions = {
    play, tint, first: () => go(0), last: () => go(last), back: () => go(shown - 1), forth: () => go(shown + 1),
    slower: () => hurry(-1), faster: () => hurry(1),
  };
  for (const [name, action] of Object.entries(actions)) button[name].addEventListener('click', action);
  const self = {sample, stop, play, go, ask, actions, last};
  controls.hidden = false;
  hurry(0);
  if (Number(slider.value) < last) go(Number(slider.value)); else show(last, false);  // a browser may restore the slider
  return self;
};

for (const sample of document.querySelectorAll('.sample')) if (sample.querySelector('.controls')) players.push(player(sample));
current = whole && players.length ? players[0] : null;

const keys = {
  ' ': 'play', k: 'play', ArrowLeft: 'back', ArrowRight: 'forth', Home: 'first', End: 'last', '+': 'faster',
  '=': 'faster', '-': 'slower', c: 'tint',
};
document.addEventListener('keydown', event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === 'Escape') return players.forEach(other => other.ask(null));
  const inside = players.find(other => other.sample.contains(document.activeElement));
  const meant = inside || current, name = keys[event.key];
  if (!meant || !name || !(inside || whole)) return;
  if (event.key === ' ' && document.activeElement.tagName === 'BUTTON') return;  // presses the button
  event.preventDefault();
  meant.actions[name]();
});
document.addEventListener('pointerdown', event => {
  if (!event.target.closest('.page')) players.forEach(other => other.ask(null));
});
const asked = /^#step=(\d+)$/.exec(location.hash);
if (asked) for (const one of players) one.go(Number(asked[1]));
else if (whole && players.length && !waits) players[0].play();
