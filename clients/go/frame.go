package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/bits"
	"regexp"
	"strconv"

	"google.golang.org/protobuf/proto"

	streamv1 "github.com/beamwire/beamwire/gen/go/beamwire/stream/v1"
)

// A frame that was read: the payload and the arrays are parts of the message.
type frame struct {
	header  *streamv1.FrameHeader
	payload []byte
	// The segment of each array by name.
	arrays map[string][]byte
	// Those of a BUNDLE.
	frames []*frame
}

const (
	prefixSize    = 16
	maxDimensions = 32
	maxBytes      = 1 << 62
)

var (
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
	arrayType  = regexp.MustCompile(`^(?:\|b1|\|[iu]1|<[iu][248]|<f[248]|<c(?:8|16)|\|S[1-9][0-9]{0,8}|<U[1-9][0-9]{0,7})$`)
)

func align(position uint64) uint64 { return (position + 63) / 64 * 64 }

// readFrame reads a message as docs/frame.md describes it; an error says why it is corrupt.
func readFrame(message []byte) (*frame, error) {
	if len(message) < prefixSize || string(message[:4]) != "BWFR" {
		return nil, errors.New("it is no frame")
	}
	if binary.LittleEndian.Uint32(message[4:]) != 1 {
		return nil, errors.New("its version or its flags are unknown")
	}
	end := prefixSize + uint64(binary.LittleEndian.Uint32(message[8:]))
	if align(end) > uint64(len(message)) {
		return nil, errors.New("its header does not fit")
	}
	encoded := message[prefixSize:end]
	if crc32.Checksum(encoded, castagnoli) != binary.LittleEndian.Uint32(message[12:]) {
		return nil, errors.New("the checksum of its header is wrong")
	}
	header := &streamv1.FrameHeader{}
	if err := proto.Unmarshal(encoded, header); err != nil {
		return nil, err
	}
	payload := message[align(end):]
	if crc32.Checksum(payload, castagnoli) != header.PayloadCrc32C {
		return nil, errors.New("the checksum of its payload is wrong")
	}
	f := &frame{header: header, payload: payload, arrays: map[string][]byte{}}
	return f, errors.Join(checkKind(header), f.findArrays(), f.findFrames())
}

func checkKind(h *streamv1.FrameHeader) error {
	data, bundle := h.Kind == streamv1.FrameKind_FRAME_KIND_DATA, h.Kind == streamv1.FrameKind_FRAME_KIND_BUNDLE
	switch {
	case h.Kind < streamv1.FrameKind_FRAME_KIND_HEADER || h.Kind > streamv1.FrameKind_FRAME_KIND_BUNDLE:
		return errors.New("its kind is unknown")
	case !bundle && int(h.EventCount) != len(h.EventIds) || bundle && len(h.EventIds) > 0:
		return errors.New("it has not one id for each event")
	case !data && (len(h.Arrays) > 0 || h.MediaType != "") || !data && !bundle && h.EventCount > 0:
		return errors.New("it carries data and is not DATA")
	case (h.Stream != nil) != (h.Kind == streamv1.FrameKind_FRAME_KIND_HEADER):
		return errors.New("exactly HEADER describes the stream")
	case (h.End != nil) != (h.Kind == streamv1.FrameKind_FRAME_KIND_END):
		return errors.New("exactly END says how it ended")
	case h.MediaType != "" && len(h.Arrays) > 0:
		return errors.New("it has arrays and a media type")
	case !bundle && len(h.FrameSizesBytes) > 0 || bundle && len(h.FrameSizesBytes) < 2:
		return errors.New("exactly BUNDLE holds frames, two at least")
	}
	return nil
}

func (f *frame) findArrays() error {
	if f.header.MediaType != "" || f.header.Kind == streamv1.FrameKind_FRAME_KIND_BUNDLE {
		return nil
	}
	end, size := uint64(0), uint64(len(f.payload))
	offsets := map[string]bool{}
	for _, a := range f.header.Arrays {
		needed, err := sizeOf(a)
		if err != nil {
			return err
		}
		if a.Codec != 0 || a.ErrorBound != 0 {
			return fmt.Errorf("array %q is encoded with codec %v, which this program cannot decode", a.Name, a.Codec)
		}
		if f.arrays[a.Name] != nil || needed != a.SizeBytes {
			return fmt.Errorf("array %q is not what it claims", a.Name)
		}
		if a.OffsetBytes%64 != 0 || a.OffsetBytes < end || a.OffsetBytes > size || needed > size-a.OffsetBytes {
			return fmt.Errorf("array %q is not where it can be", a.Name)
		}
		end = a.OffsetBytes + needed
		f.arrays[a.Name] = f.payload[a.OffsetBytes:end]
		offsets[a.RowOffsets] = true
	}
	if end != size {
		return errors.New("its payload does not end with its arrays")
	}
	for _, a := range f.header.Arrays {
		if err := f.checkRows(a, offsets[a.Name]); err != nil {
			return err
		}
	}
	return nil
}

func sizeOf(a *streamv1.Array) (uint64, error) {
	if !arrayType.MatchString(a.Dtype) {
		return 0, fmt.Errorf("array %q has element type %q", a.Name, a.Dtype)
	}
	item, err := strconv.ParseUint(a.Dtype[2:], 10, 32)
	if a.Dtype[1] == 'U' {
		item *= 4
	}
	size, extent := item, item
	for _, axis := range a.Shape {
		high, low := bits.Mul64(extent, max(axis, 1))
		if high != 0 || low > maxBytes {
			return 0, fmt.Errorf("array %q has an impossible shape", a.Name)
		}
		extent, size = low, size*axis
	}
	if len(a.Shape) == 0 || len(a.Shape) > maxDimensions {
		return 0, fmt.Errorf("array %q has %d axes", a.Name, len(a.Shape))
	}
	return size, err
}

func (f *frame) checkRows(a *streamv1.Array, companion bool) error {
	if a.RowOffsets == "" {
		if !companion && a.Shape[0] != uint64(f.header.EventCount) {
			return fmt.Errorf("array %q has not one row for each event", a.Name)
		}
		return checkText(a, f.arrays[a.Name])
	}
	rows := f.arrays[a.RowOffsets]
	for _, other := range f.header.Arrays {
		if other.Name == a.RowOffsets && (other.Dtype != "<i8" || len(other.Shape) != 1) {
			rows = nil
		}
	}
	if uint64(len(rows)) != 8*(uint64(f.header.EventCount)+1) {
		return fmt.Errorf("array %q has no row offsets", a.Name)
	}
	before := uint64(0)
	for at := 0; at < len(rows); at += 8 {
		row := binary.LittleEndian.Uint64(rows[at:])
		if row < before || row > a.Shape[0] || at == 0 && row != 0 {
			return fmt.Errorf("the row offsets of array %q do not divide it", a.Name)
		}
		before = row
	}
	if before != a.Shape[0] {
		return fmt.Errorf("the row offsets of array %q do not divide it", a.Name)
	}
	return checkText(a, f.arrays[a.Name])
}

func checkText(a *streamv1.Array, segment []byte) error {
	for at := 0; a.Dtype[1] == 'U' && at < len(segment); at += 4 {
		if binary.LittleEndian.Uint32(segment[at:]) > 0x10FFFF {
			return fmt.Errorf("array %q is not text", a.Name)
		}
	}
	return nil
}

func (f *frame) findFrames() error {
	end, events, h := uint64(0), uint32(0), f.header
	for number, size := range h.FrameSizesBytes {
		begin := align(end)
		end = begin + uint64(size)
		if end > uint64(len(f.payload)) {
			return errors.New("its frames do not fit")
		}
		inner, err := readFrame(f.payload[begin:end])
		if err != nil {
			return err
		}
		is := inner.header
		if is.Kind != streamv1.FrameKind_FRAME_KIND_DATA || is.Epoch != h.Epoch || is.Producer != h.Producer ||
			is.Sequence != h.Sequence+uint64(number) {
			return errors.New("it bundles what does not belong together")
		}
		events += is.EventCount
		f.frames = append(f.frames, inner)
	}
	if len(h.FrameSizesBytes) > 0 && (end != uint64(len(f.payload)) || events != h.EventCount) {
		return errors.New("its frames are not what it claims")
	}
	return nil
}
