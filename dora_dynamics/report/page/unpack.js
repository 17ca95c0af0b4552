// Packed arrays back into typed arrays: the inverse of packing.py.

const TYPES = { float32: Float32Array, int32: Int32Array };

function inflate(packed) {
  const binary = atob(packed.deflated);
  const bytes = Uint8Array.from(binary, (character) => character.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate")));
}

async function unpack(packed) {
  if (packed.type === "text") return inflate(packed).text();
  const planes = new Uint8Array(await inflate(packed).arrayBuffer());
  const size = TYPES[packed.type].BYTES_PER_ELEMENT;
  const values = new Uint8Array(planes.length);
  for (let plane = 0; plane < size; plane++) {
    const start = plane * packed.length;
    for (let i = 0; i < packed.length; i++) values[i * size + plane] = planes[start + i];
  }
  return new TYPES[packed.type](values.buffer);
}

function isPacked(value) {
  return value !== null && typeof value === "object" && typeof value.deflated === "string";
}

// Every packed array below `value`, unpacked in place.
async function unpackAll(value) {
  if (value === null || typeof value !== "object") return;
  for (const [key, inner] of Object.entries(value)) {
    if (isPacked(inner)) value[key] = await unpack(inner);
    else await unpackAll(inner);
  }
}
