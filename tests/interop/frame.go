package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"google.golang.org/protobuf/proto"

	streamv1 "github.com/beamwire/beamwire/gen/go/beamwire/stream/v1"
)

const (
	magic     = "BWFR"
	version   = 1
	prefix    = 16
	alignment = 64
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func align(position int) int {
	return (position + alignment - 1) / alignment * alignment
}

// encode makes a frame, as docs/frame.md describes it.
func encode(header *streamv1.FrameHeader, payload []byte) ([]byte, error) {
	header.PayloadCrc32C = crc32.Checksum(payload, castagnoli)
	encoded, err := proto.Marshal(header)
	if err != nil {
		return nil, err
	}
	frame := make([]byte, align(prefix+len(encoded))+len(payload))
	copy(frame, magic)
	binary.LittleEndian.PutUint16(frame[4:], version)
	binary.LittleEndian.PutUint32(frame[8:], uint32(len(encoded)))
	binary.LittleEndian.PutUint32(frame[12:], crc32.Checksum(encoded, castagnoli))
	copy(frame[prefix:], encoded)
	copy(frame[align(prefix+len(encoded)):], payload)
	return frame, nil
}

// decode reads a frame; its error says what is wrong with it.
func decode(frame []byte) (*streamv1.FrameHeader, []byte, error) {
	if len(frame) < prefix || string(frame[:4]) != magic {
		return nil, nil, errors.New("not a frame")
	}
	if got := binary.LittleEndian.Uint16(frame[4:]); got != version {
		return nil, nil, fmt.Errorf("version %d", got)
	}
	end := prefix + int(binary.LittleEndian.Uint32(frame[8:]))
	if end > len(frame) || align(end) > len(frame) {
		return nil, nil, errors.New("its header does not fit into it")
	}
	if crc32.Checksum(frame[prefix:end], castagnoli) != binary.LittleEndian.Uint32(frame[12:]) {
		return nil, nil, errors.New("the checksum of its header is wrong")
	}
	header := &streamv1.FrameHeader{}
	if err := proto.Unmarshal(frame[prefix:end], header); err != nil {
		return nil, nil, err
	}
	payload := frame[align(end):]
	if crc32.Checksum(payload, castagnoli) != header.GetPayloadCrc32C() {
		return nil, nil, errors.New("the checksum of its payload is wrong")
	}
	return header, payload, nil
}

// split takes a bundle apart into the frames in it; any other frame is returned as it is.
func split(frame []byte, header *streamv1.FrameHeader, payload []byte) ([][]byte, error) {
	if header.GetKind() != streamv1.FrameKind_FRAME_KIND_BUNDLE {
		return [][]byte{frame}, nil
	}
	var frames [][]byte
	begin := 0
	for _, size := range header.GetFrameSizesBytes() {
		end := begin + int(size)
		if end > len(payload) {
			return nil, errors.New("its frames do not fit into it")
		}
		frames = append(frames, payload[begin:end])
		begin = align(end)
	}
	return frames, nil
}
